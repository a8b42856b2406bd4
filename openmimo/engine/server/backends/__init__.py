"""What makes the tokens behind the server: the engine, or a stub."""
