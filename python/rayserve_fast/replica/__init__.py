"""What runs inside a replica process: the user's callable, its event loop, the conversion of requests and results."""
