"""Where frames come from: cameras, microphones, network streams and files."""
