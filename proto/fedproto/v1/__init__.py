"""Version 1 of the wire messages: .proto files and their generated stubs."""
