"""What an evaluation of a reward rests on and finds: its material, scores, trials, and how far it can be optimised."""
