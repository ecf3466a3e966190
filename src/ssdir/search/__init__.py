"""Studies: many trainings that share what they learn, on any number of processes and machines."""
