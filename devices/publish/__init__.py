"""From a result to the broker: the spool that loses nothing, the publisher, and what comes back: commands."""
