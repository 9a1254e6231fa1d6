"""`reasonedit bench`: counted work on any machine, timed arms side by side, the released code and others as peers.

options and command: the command line. counted: full-size forwards and one loop, counted. timed: groups of arms, each arm a
process of its own (worker), interleaved (clock). arms: what our processes run; peers and peer_*: the others'. full: the
groups of a large GPU. report: what is printed, the JSON and the plot.
"""
