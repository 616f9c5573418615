"""What one session with a GPU shows: that the package is right there, never waits, and how fast it is.

Parts run in the order of their value. Each runs in a process of its own with a limit of time, because a
kernel that reads outside its memory makes every later call of its process fail. Results are written after
each line.

`parts` lists the parts; `lines` and `sizes` are what they return and read; `processes` and `run` start them
and keep the time; `report` writes the results; `scenes` makes inputs. Every other module is one part.

On a CPU the same code runs at small sizes: a rehearsal, whose figures mean nothing.
"""
