"""What people use: the Python SDK, the `nested` command, the web page. Knows the server only by HTTP."""
