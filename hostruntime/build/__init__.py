"""From a recipe to an image: the plan, its steps, layers, and what is told of it."""
