"""``edgekit soak``: a runtime, a broker, its network and its disk fail, and every prediction is accounted for."""
