"""A study: what its file may contain, the stages it becomes, and how they are run."""
