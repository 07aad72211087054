"""What server and engine tell each other, as frames of JSON. No torch."""
