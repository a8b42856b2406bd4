"""What an environment is, and the services that every environment uses."""
