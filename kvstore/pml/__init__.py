"""PML, the markup language of Prompt Cache: prompts made of modules that are computed once and used in any prompt.

A schema says what there is; a prompt names what it wants of it:

    <schema name="trip">                                <prompt schema="trip">
      You plan trips.                                     <miami><sights/></miami>
      <module name="plan">                                <plan days="three"/>
        Plan <parameter name="days" length="8"/> days.    <user>Mind the heat.</user>
      </module>                                           <assistant/>
      <union>                                           </prompt>
        <module name="miami">Miami is hot.
          <module name="sights">See the beach.</module>
        </module>
        <module name="oslo" src="oslo.txt"/>
      </union>
    </schema>

A module sees itself alone, as it stands in the schema, so it is computed once. ``Schema.parse(text, tokenizer=...)``
compiles a schema, its ``encodings()`` are what is to be computed and stored, and ``prompt(text)`` is a composition of
what is stored and what is not: arguments, free text, and modules with ``cache="false"``.

* Every part has its place in the schema. Members of a union share one, as long as the longest; ``length`` tokens are
  kept for an argument. What a prompt leaves out stays a gap (``layout="packed"`` closes them, also those behind short
  arguments). ``len(schema)`` positions are reserved, and text at a prompt's end stands behind all of them.
* Text that is in no module within a module, or the schema, is there whenever that is. Modules come in the schema's
  order, whatever the prompt's.
* Free text stands right behind the module named before it (behind the room of its union), before the first module if
  none is, behind everything at the end; what follows moves on. It cannot stand within a module's tag.
* ``<system>``, ``<user>`` and ``<assistant>`` write what the tokenizer's chat template has around such a turn, in
  schemas and prompts, around text and modules. An empty ``<assistant/>`` opens the reply; ``<system/>`` begins a
  conversation without a system message. What a template has only at the very beginning comes with the system's tag.
* White space at the ends of a text is one space; alone it is nothing, but for a space between two parameters. CDATA and
  files stay as they are. Tags that PML does not know are text in a schema. Text is tokenized piece by piece.
* ``<scaffold modules="plan miami.sights"/>`` computes modules together besides, for prompts that have all of them where
  the scaffold had them. With a module goes the member that a union in it names, ``<union scaffold="...">``.
* Room for arguments holds ``scaffold="..."`` of the parameter and placeholders while the text behind it is computed.

``escaped(string)`` is markup that is read as this very string. ``kvstore.pml.frontend`` writes schemas from Python
functions.
"""

from kvstore.pml.markup import escaped
from kvstore.pml.schema import Schema

__all__ = ["Schema", "escaped"]
