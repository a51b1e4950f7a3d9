"""Pure model mathematics: no input or output."""
