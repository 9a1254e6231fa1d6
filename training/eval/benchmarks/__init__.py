"""Published benchmarks of instruction-guided editing: GEdit, ImgEdit, KRIS, RISE, Reason50K (`reasonedit-eval`).

items    one row per thing to edit, the same for all benchmarks        prepare  reads the official layouts
outputs  where an edited picture lies in the official result layout    protocols, questions  what a judge is asked
judge    asks, through the runner of `reasonedit-data`                 marks, aggregate  from answers to scores
generate makes the edited pictures                                     tables, page, compare  what people read
pixels, embeddings  what is measured without a judge                   ratings  what people say (Ins-Align)
"""
