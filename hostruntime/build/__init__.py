"""From a recipe to an image: plans, steps, layers, events and reports."""
