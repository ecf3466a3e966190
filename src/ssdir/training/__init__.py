"""Training: the loop, the tasks that it trains, and what it writes."""
