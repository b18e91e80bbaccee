"""Images: immutable file trees that share files by hard links."""
