"""What every part of a study stands on: sections of parameters, where files lie, how they are written, random numbers.

Uses none of the other rooms.
"""
