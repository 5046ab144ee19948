"""Forward passes -> neuron statistics: recorder (hooks), moments (running sums), probe, observer (docs/capture.md)."""
