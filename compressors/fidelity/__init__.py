"""Fidelity gate: predicts from a compressed passage alone whether answers survive its compression."""
