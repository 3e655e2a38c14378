"""Floor 5: one adapter method, one file. A spec says what trains, how it starts and which settings the formula runs with."""
