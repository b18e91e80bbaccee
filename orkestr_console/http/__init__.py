"""The path of every request: the server, middleware, decorators, validation and errors."""
