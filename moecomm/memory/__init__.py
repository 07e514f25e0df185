"""Memory that other ranks can write, and the signals that go with it."""
