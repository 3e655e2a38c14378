"""Frozen weights in few bits: what other libraries' quantised layers hold, as matrices [N,K]."""
