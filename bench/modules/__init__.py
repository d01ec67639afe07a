"""What prompts made of separately encoded documents lose, and what recomputing or training wins back."""
