"""What a run is worth: its figures beside what needs no learning to reach, its closing table and its pictures."""
