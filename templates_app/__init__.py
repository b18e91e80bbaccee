"""Custom templates: recipes, their builds, and the images that come of them."""
