"""Device side: sources -> interpreter -> pipeline -> publisher. Never imports TensorFlow."""
