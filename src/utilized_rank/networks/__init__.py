"""What the library needs of a network: attention made explicit, cost, predictions, a part of it run alone.

The library begins here: it knows no study, no file and no image format. Uses none of the other rooms.
"""
