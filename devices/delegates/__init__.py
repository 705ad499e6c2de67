"""What a model runs on: the CPU in this process, or a delegate in one of its own, and the next where one fails."""
