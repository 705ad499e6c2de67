"""``edgekit doctor``: what a device has, and how to mend what is missing."""
