"""Look at models and at what runs wrote: entropy, resuscitation, acquisition, figures."""
