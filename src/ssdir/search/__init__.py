"""Studies: many trainings that know of each other, on any number of processes and machines."""
