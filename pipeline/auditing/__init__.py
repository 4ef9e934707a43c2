"""What an audit of a judge asks and finds: cases, people's labels, how the judge is examined, and the findings."""
