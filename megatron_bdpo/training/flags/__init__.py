"""What the user has said: flags, recipes, and what is refused of them."""
