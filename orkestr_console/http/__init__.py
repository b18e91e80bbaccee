"""What every request passes, whichever page or call it is for, and the server it comes to."""
