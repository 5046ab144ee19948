"""The files rooms hand each other, reader beside writer."""
