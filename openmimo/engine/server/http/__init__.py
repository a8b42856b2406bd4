"""HTTP layer: bodies, errors, limits, middleware, streams, and the service that runs requests on a backend."""
