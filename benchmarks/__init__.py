"""What the package costs, measured: ``make bench`` runs all of it and writes ``reports/benchmarks/``."""
