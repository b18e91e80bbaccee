"""Images: trees of files that never change, kept once and shared by hard links."""
