"""What the console's pages share: signing in, the frame around a page, live updates, output."""
