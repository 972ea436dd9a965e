"""How much of its space does each layer of a trained network use?"""
