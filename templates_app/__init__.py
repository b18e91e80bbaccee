"""Custom templates: recipes, their builds, and the images they produce."""
