"""What the command line runs, beside `sgp.train`: `audit`, `verify`, `doctor`."""
