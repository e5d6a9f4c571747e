"""A GPU that is not there: streams that reorder work, memory that is real, and a checker of the order.

- ``gpu`` can stand where ``torch.cuda`` does (``hardware`` and ``order`` are behind it), ``operations`` is
  what it is given to do;
- ``device`` is the seam on it, ``memory`` says who owns what its streams use;
- ``races`` says what no fence orders, on ``ranges`` of bytes that ``shadow`` remembers; ``sites`` says who
asked; - ``timeline`` runs the same in the time that ``model`` gives it, and ``plot`` draws that.
"""
