"""Parts of `bench_server`: requests, clients, and the process of the server."""
