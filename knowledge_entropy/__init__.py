"""Knowledge entropy in other programs: measure, observe, edit and score models, and inject knowledge into training."""
