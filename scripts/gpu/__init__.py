"""`make gpu`: what this program reaches on a GPU, in eight minutes and one table."""
