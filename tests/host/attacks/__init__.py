"""Programs that try to get out of a container.  They run inside; tests on the host judge them."""
