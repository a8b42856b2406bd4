"""What `bench_server` is made of: the requests of a soak, the clients that send them, the server's process."""
