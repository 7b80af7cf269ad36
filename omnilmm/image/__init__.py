"""Pictures: from what a client sent to the square of pixels a vision tower takes."""
